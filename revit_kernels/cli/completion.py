"""`revit completion`: a script that completes commands, options and choices in a shell."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")

BASH = """\
_revit() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  case "${{COMP_WORDS[1]}} $before" in
{choices}
  esac
  if [ -z "$words" ]; then
    if [ "$COMP_CWORD" = 1 ]; then words="{commands}"
    elif [ "${{word#-}}" != "$word" ]; then
      case "${{COMP_WORDS[1]}}" in
{options}
      esac
    fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _revit revit
"""


def add(commands):
    completion = commands.add_parser(
        "completion",
        help="print a script that completes this command in a shell",
        description="Prints a script for a shell. For bash: source <(revit completion bash), in ~/.bashrc; for zsh:\n"
        "source <(revit completion zsh), in ~/.zshrc; for fish: revit completion fish | source.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS)
    return completion


def run(args) -> int:
    from revit_kernels.cli import parser

    print(script(parser(), args.shell), end="")
    return 0


def subcommands(main: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    (action,) = (a for a in main._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def script(main: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell of SHELLS."""
    if shell == "fish":
        return _fish(main)
    commands, options, choices = subcommands(main), [], []
    for name, parser in commands.items():
        strings = [s for action in parser._actions for s in action.option_strings]
        options.append(f'        {name}) words="{" ".join(strings)}" ;;')
        for action in parser._actions:
            if action.choices:
                at = [f'"{name} {s}"' for s in action.option_strings or [name]]
                choices.append(f'    {"|".join(at)}) words="{" ".join(map(str, action.choices))}" ;;')
    text = BASH.format(commands=" ".join(commands), options="\n".join(options), choices="\n".join(choices))
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def _fish(main: argparse.ArgumentParser) -> str:
    commands = subcommands(main)
    helps = {a.dest: a.help for action in main._subparsers._group_actions for a in action._choices_actions}
    lines = []
    for name, parser in commands.items():
        said = _quoted(helps.get(name) or "")
        lines.append(f"complete -c revit -n __fish_use_subcommand -f -a {name} -d {said}")
        for action in parser._actions:
            flags = [f"-l {s[2:]}" if s.startswith("--") else f"-s {s[1:]}" for s in action.option_strings]
            if action.choices:
                flags.append(
                    ("-x" if action.option_strings else "-f") + f" -a {_quoted(' '.join(map(str, action.choices)))}"
                )
            elif action.option_strings and action.nargs != 0:
                flags.append("-r")
            if flags:
                said = _quoted(" ".join((action.help or "").replace("%%", "%").split()))
                lines.append(f'complete -c revit -n "__fish_seen_subcommand_from {name}" {" ".join(flags)} -d {said}')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
