"""Why an item is recommended: what each item of a history adds, and what would change without it."""
