"""The machinery behind configs/flags.py; nothing here is a config."""
