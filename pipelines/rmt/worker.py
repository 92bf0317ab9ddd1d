"""What of this project runs inside vLLM's workers, which load it by name (vLLM's worker_extension_cls)."""

from typing import Any


class RolloutWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def take_weights(self, weights: dict[str, Any]) -> None:
        """Put weights, numpy arrays or tensors by their names in the model's files, into the running model."""
        import torch

        tensors = ((name, torch.as_tensor(value)) for name, value in weights.items())
        # vLLM's own way to load in place: it undoes and repeats what its kernels want done to weights
        self.model_runner.reload_weights(weights_iterator=tensors)

    def seed_sampling(self, seed: int) -> None:
        """Let what is sampled next follow from `seed`. A seed of each request's own fails on CPUs in vLLM 0.32 where a
        prompt is computed in two steps."""
        import torch

        torch.manual_seed(seed)
