"""What devices and a gateway say to each other, as versioned protobuf; see docs/gateway.md."""
