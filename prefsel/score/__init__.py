"""Groups → completion columns."""
