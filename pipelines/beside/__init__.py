"""remit train --eval-tasks: models of a run evaluated on tasks beside the training."""
