"""What an agent acts with: tools, toolsets, the sandbox they run in, the facts they search."""
