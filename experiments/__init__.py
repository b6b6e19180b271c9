"""One file a reproduced table or study, with its generated results beside it; the library imports none of it."""
