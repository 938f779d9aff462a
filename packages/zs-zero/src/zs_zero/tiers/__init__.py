"""Where states live when they are not on the device: host memory, files; and how they move."""
