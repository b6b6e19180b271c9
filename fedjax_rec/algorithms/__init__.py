"""One paper, one file: what a client does, what the server does."""
