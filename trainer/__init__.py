"""Mid-train a base model from annotated shards: torch and transformers live here, no reference model does.

For other training loops: `trainer.head.objective_loss` is the loss head, `trainer.objectives` holds the weights as pure
functions, `trainer.data.RowReader` reads rows.
"""
