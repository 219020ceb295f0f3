"""What a cluster job is before it starts: its plan, and the snapshot that it runs from. No torch."""
