"""The paper's claim about its graph, tested on planted communities of experts under noise."""
