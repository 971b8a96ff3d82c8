"""What a run needs of its machines, by arithmetic: memory, disk, time."""
