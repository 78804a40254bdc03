"""What is not about models: text, files, the hub, devices, random numbers."""
