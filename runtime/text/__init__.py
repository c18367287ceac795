"""From tokens to text: detokenization, words, utterances, events, output formats."""
