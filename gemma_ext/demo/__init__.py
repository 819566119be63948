"""First contact: train a pocket Gemma-2 twice, measure a Gemma-2-2B head, write one page.

`gemma-ext demo` runs the stages in order and keeps each one's result in the output folder, so that
an interrupted run goes on where it stopped, inside a training too.
"""
