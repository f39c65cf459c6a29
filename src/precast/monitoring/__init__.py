"""What listens to events: counters, log lines, progress. Nothing here changes what happens."""
