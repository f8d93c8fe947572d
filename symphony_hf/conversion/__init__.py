"""A model in another form: adapters, 4 bits, upcycling, compression, and what is inspected before."""
