"""What a run writes: metrics, TensorBoard, console, throughput, profiles and plots."""
