"""Virtual users: histories drawn from what was released, to hand out in place of real ones."""
