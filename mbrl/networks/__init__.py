"""Networks: plain `Network(init, apply)` pairs over pytrees of parameters."""
