"""Other people's libraries, one a module; each needs its own extra."""
