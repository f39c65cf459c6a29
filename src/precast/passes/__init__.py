"""Changes to a graph before it is compiled: `interface` first, `chosen` for what runs."""
