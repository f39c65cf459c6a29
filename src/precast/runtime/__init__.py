"""What runs at a call: the slots that hold code (`slot`), and who serves the call (`dispatch`)."""
