"""What each command does: train, finish, dry run, evaluate, export."""
