"""What runs at a call: the slots that hold pieces' code (`slot`), and who serves a call (`dispatch`)."""
