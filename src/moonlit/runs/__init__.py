"""A run on the disk: its folder, who writes there, how far it is."""
