// Builds the cards of the concept picker. Gradio gives `element`, `props`, `trigger` and `watch`.
const root = element.querySelector('.picker');
const add = (parent, kind, name, text) => {
  const node = document.createElement(kind);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
const toggle = (name) => {
  const picked = props.value || [];
  if (picked.includes(name)) props.value = picked.filter((other) => other !== name);
  else if (picked.length < props.most) props.value = [...picked, name];
  else return;
  show();
  trigger('change');
};
const build = () => {
  root.replaceChildren();
  for (const choice of props.choices) {
    const card = add(root, 'button', 'card');
    card.type = 'button';
    card.dataset.name = choice.name;
    card.title = choice.description || choice.title;
    if (choice.picture) {
      const image = add(card, 'img');
      image.src = choice.picture;
      image.alt = '';
    } else add(card, 'span', 'blank', choice.name.slice(0, 1).toUpperCase());
    add(card, 'span', 'name', choice.name);
    add(card, 'span', 'trigger', choice.trigger);
    add(card, 'span', 'noun', choice.noun);
    add(card, 'span', 'place');
    card.addEventListener('click', () => toggle(choice.name));
  }
  show();
};
const show = () => {
  const picked = props.value || [];
  for (const card of root.children) {
    const place = picked.indexOf(card.dataset.name);
    card.setAttribute('aria-pressed', place >= 0);
    card.querySelector('.place').textContent = place < 0 ? '' : `{${place}}`;
    card.classList.toggle('full', place < 0 && picked.length >= props.most);
  }
};
watch('choices', build);
watch('value', show);
build();
