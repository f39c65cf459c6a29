"""Where a graph is cut: rules that choose, and the one algorithm that cuts."""
