"""What can be recovered from what crosses: attacks that run, one file each."""
