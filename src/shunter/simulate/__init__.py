"""Time, memory and communication of training steps on machines that are not here: shapes in, predictions out."""
