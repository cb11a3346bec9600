// The gallery of concepts and what is set for the picked ones. Gradio gives `element`, `props`, `trigger`, `watch`.
const root = element.querySelector('.picker');
const add = (parent, kind, name, text) => {
  const node = document.createElement(kind);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
const uses = () => props.value || [];
const known = (name) => props.choices.find((choice) => choice.name === name) || { name, title: name };
const change = (value) => { props.value = value; show(); trigger('change'); };
const set = (name, changes) => change(uses().map((use) => (use.name === name ? { ...use, ...changes } : use)));
const fresh = (name) => ({
  name, on: true, weight: known(name).weight,
  blocks: Object.fromEntries(Object.keys(props.blocks).map((block) => [block, 1])),
});
const toggle = (name) => {
  if (uses().some((use) => use.name === name)) change(uses().filter((use) => use.name !== name));
  else if (uses().length < props.most) change([...uses(), fresh(name)]);
  else told.textContent = `No more than ${props.most}: leave one out first.`;
};

// ------------------------------------------------------------ the gallery
const search = add(add(root, 'div', 'tools'), 'input', 'search');
search.type = 'search';
search.placeholder = 'Search concepts';
search.setAttribute('aria-label', 'Search concepts by name, trigger or class');
const told = add(search.parentNode, 'span', 'told');
told.setAttribute('role', 'status');
const cards = add(root, 'div', 'cards');
cards.setAttribute('role', 'group');
cards.setAttribute('aria-label', 'Concepts');
const filter = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards.children) {
    card.hidden = !words.every((word) => card.dataset.text.includes(word));
    shown += !card.hidden;
  }
  const all = cards.children.length;
  told.textContent = all === 0 ? 'None for this base model yet: add your own under Concepts.'
    : words.length ? `${shown} of ${all}` : '';
};
search.addEventListener('input', filter);
const build = () => {
  cards.replaceChildren();
  for (const choice of props.choices) {
    const card = add(cards, 'button', 'card');
    card.type = 'button';
    card.dataset.name = choice.name;
    card.dataset.text = [choice.name, choice.title, choice.trigger, choice.noun].join(' ').toLowerCase();
    card.title = choice.description || choice.title;
    if (choice.picture) {
      const image = add(card, 'img');
      image.src = choice.picture;
      image.alt = '';
    } else add(card, 'span', 'blank', choice.title.slice(0, 1).toUpperCase());
    add(card, 'span', 'name', choice.title);
    add(card, 'span', 'trigger', choice.trigger);
    add(card, 'span', 'noun', choice.noun);
    add(card, 'span', 'place');
    card.addEventListener('click', () => toggle(choice.name));
  }
  filter();
  show();
};

// ------------------------------------------------------------ what is picked
const list = add(root, 'ul', 'uses');
list.setAttribute('aria-label', 'Picked concepts');
const chips = add(root, 'div', 'chips');
const slider = (parent, label, most, least, start, then) => {
  const line = add(parent, 'label', 'dial');
  add(line, 'span', 'what', label);
  const range = add(line, 'input');
  Object.assign(range, { type: 'range', min: least, max: most, step: 0.05, value: start });
  const number = add(line, 'output', '', String(start));
  range.addEventListener('input', () => { number.textContent = range.value; });
  range.addEventListener('change', () => then(Number(range.value)));
  return (value) => { range.value = value; number.textContent = String(Math.round(value * 100) / 100); };
};
const row = (use) => {
  const title = known(use.name).title, item = add(list, 'li', 'use');
  item.dataset.name = use.name;
  const head = add(item, 'div', 'head');
  add(head, 'span', 'place');
  add(head, 'span', 'title', title);
  const on = add(add(head, 'label', 'on'), 'input');
  on.type = 'checkbox';
  on.setAttribute('aria-label', `Use ${title}`);
  on.parentNode.append('on');
  on.addEventListener('change', () => set(use.name, { on: on.checked }));
  const off = add(head, 'button', 'leave', '×');
  off.type = 'button';
  off.setAttribute('aria-label', `Leave ${title} out`);
  off.addEventListener('click', () => toggle(use.name));
  const weight = slider(item, 'Weight', props.heaviest, 0.05, use.weight, (value) => set(use.name, { weight: value }));
  const more = add(item, 'details');
  add(more, 'summary', '', 'Block weights');
  const dials = Object.entries(props.blocks).map(([block, label]) => [
    block,
    slider(more, label, 2, 0, use.blocks[block], (value) => {
      const now = uses().find((other) => other.name === use.name);
      set(use.name, { blocks: { ...now.blocks, [block]: value } });
    }),
  ]);
  item.fill = (now) => {
    on.checked = now.on;
    item.classList.toggle('off', !now.on);
    weight(now.weight);
    for (const [block, dial] of dials) dial(now.blocks[block]);
  };
};
const insert = (text) => {
  const field = document.querySelector('#prompt textarea');
  field.setRangeText(text, field.selectionStart, field.selectionEnd, 'end');
  field.dispatchEvent(new Event('input', { bubbles: true }));
  field.focus();
};
const chip = (name, k) => {
  const button = add(chips, 'button', 'chip', `{${k}} ${known(name).title}`);
  button.type = 'button';
  button.title = `Put “${known(name).trigger}” into the prompt`;
  button.addEventListener('click', () => insert(`{${k}}`));
};
let rows = '';
const show = () => {
  const now = uses();
  for (const card of cards.children) {
    const place = now.findIndex((use) => use.name === card.dataset.name);
    card.setAttribute('aria-pressed', place >= 0);
    card.querySelector('.place').textContent = place < 0 ? '' : `{${place}}`;
    card.classList.toggle('full', place < 0 && now.length >= props.most);
    card.setAttribute('aria-disabled', place < 0 && now.length >= props.most);
  }
  const names = JSON.stringify(now.map((use) => [use.name, known(use.name).title]));
  if (names !== rows) {
    rows = names;
    list.replaceChildren();
    chips.replaceChildren();
    if (now.length) add(chips, 'span', 'what', 'Put into the prompt:');
    now.forEach((use, k) => { row(use); chip(use.name, k); });
  }
  now.forEach((use, k) => {
    list.children[k].querySelector('.place').textContent = `{${k}}`;
    list.children[k].fill(use);
  });
};
watch('choices', build);
watch('value', show);
build();
