"""Studies of one feature each; they change rarely."""
