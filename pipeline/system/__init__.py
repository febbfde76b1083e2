"""The machine: devices, processes, signals, files, the terminal, HTML parts."""
