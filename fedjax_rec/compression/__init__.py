"""Compression links: fewer bytes on the wire, as links of the update chain."""
