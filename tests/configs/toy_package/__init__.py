"""A small package of configs, shaped like the real one."""
