"""How results look on a terminal, in a pipe and in a notebook; one module for each kind of them."""
