"""Router replay: the experts that were chosen in one forward are chosen again in another."""
