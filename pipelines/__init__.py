"""The command line, the sample project and what else wires scorer and trainer together."""
