"""`fedjax-rec`, the command line."""
