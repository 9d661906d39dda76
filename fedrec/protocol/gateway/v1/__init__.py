"""Version 1. `gateway_pb2` is generated from `gateway.proto` by the command at its top."""
