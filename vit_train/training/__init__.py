"""The loop: a trainer, what it is made of, and what can go wrong in it."""
