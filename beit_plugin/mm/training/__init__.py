"""What a training in mmengine needs: precision, layer decay, resuming, sharding."""
