"""`python -m gemma_ext.lm`: the command line of lm-eval, which knows the model `gemma_ext`."""

from gemma_ext.lm.harness import main

if __name__ == "__main__":
    main()
