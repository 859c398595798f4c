"""What a run needs beside the algorithm: processes, checkpoints, seeds, precision, progress, files."""
