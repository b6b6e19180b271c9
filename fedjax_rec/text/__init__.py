"""Text as frozen public knowledge: a pre-trained encoder that turns titles, queries and reviews into vectors."""
