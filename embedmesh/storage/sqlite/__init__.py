"""A store in one SQLite file: its connections, group commit on its disc, its backup."""
