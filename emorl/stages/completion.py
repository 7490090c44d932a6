"""A script that completes commands, options and files in a shell (`source <(emorl completion bash)`)."""

import argparse

_BASH = """\
_emorl() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} options=
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word")); return; fi
  case "$command" in
{cases}
  esac
  if [[ $word == -* ]]; then COMPREPLY=($(compgen -W "$options" -- "$word")); else COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _emorl emorl
"""
_ZSH = "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"], help="source the output: source <(emorl completion bash)")


def command(options: argparse.Namespace) -> None:
    parser = options.whole_parser()
    [subparsers] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    cases = []
    for name, command_parser in subparsers.choices.items():
        words = [word for action in command_parser._actions for word in action.option_strings if word.startswith("--")]
        cases.append(f'    {name}) options="{" ".join(words)}" ;;')
    script = _BASH.format(commands=" ".join(subparsers.choices), cases="\n".join(cases))
    print((_ZSH if options.shell == "zsh" else "") + script, end="")
