"use strict";
// Charts of one section with different choices take each other's place; without scripts all of them are shown.
{
  const figures = [...document.querySelectorAll("figure[data-choice]")];
  const choices = [...new Set(figures.map((figure) => figure.dataset.choice))];
  const groups = [];

  const show = (choice) => {
    for (const { area, buttons, own } of groups) {
      // A section that lacks the choice keeps what it shows.
      if (!own.includes(choice)) continue;
      for (const button of buttons) button.checked = button.value === choice;
      for (const figure of area.querySelectorAll("figure[data-choice]")) figure.hidden = figure.dataset.choice !== choice;
    }
  };

  const radio = (name, choice) => {
    const label = document.createElement("label");
    const button = document.createElement("input");
    Object.assign(button, { type: "radio", name, value: choice });
    button.addEventListener("change", () => show(choice));
    label.append(button, ` ${choice}`);
    return [label, button];
  };

  const areas = new Set(figures.map((figure) => figure.closest(".charts")));
  for (const area of areas) {
    const own = choices.filter((choice) => [...area.children].some((figure) => figure.dataset.choice === choice));
    const field = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = "Accuracy against";
    const made = own.map((choice) => radio(`choice${groups.length}`, choice));
    field.className = "choose";
    field.append(legend, ...made.map(([label]) => label));
    area.before(field);
    const buttons = made.map(([, button]) => button);
    groups.push({ area, own, buttons });
    buttons[0].checked = true;
    for (const figure of area.children) figure.hidden = figure.dataset.choice !== undefined && figure.dataset.choice !== own[0];
  }
}
