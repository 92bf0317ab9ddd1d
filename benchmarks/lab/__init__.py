"""The laboratory: the paper's comparisons on tiny models. docs/lab.md says what is compared and how."""
