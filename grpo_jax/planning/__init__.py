"""What a run needs: memory, devices, operations, and the choices that follow."""
