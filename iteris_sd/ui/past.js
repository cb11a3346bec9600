// The list of compositions that were made. `props.value`: [{id, title, told, made, phase, picture}].
const root = element.querySelector('.past');
const add = (parent, kind, name, text) => {
  const node = document.createElement(kind);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
let ticked = [], sure = '';
const ask = (wanted, ids) => trigger('select', { wanted, ids });
const bar = add(root, 'div', 'bar');
const compare = add(bar, 'button', '', 'Compare the two');
compare.type = 'button';
compare.addEventListener('click', () => ask('compare', ticked));
const list = add(root, 'ul');
const button = (parent, label, title, act) => {
  const node = add(parent, 'button', '', label);
  node.type = 'button';
  node.setAttribute('aria-label', `${label}: ${title}`);
  node.addEventListener('click', () => act(node));
};
const show = () => {
  sure = '';
  const entries = props.value || [];
  ticked = ticked.filter((id) => entries.some((entry) => entry.id === id));
  list.replaceChildren();
  if (!entries.length) add(list, 'li', 'none', 'Nothing yet: compose something, and it is here.');
  for (const entry of entries) {
    const item = add(list, 'li', 'entry');
    item.dataset.id = entry.id;
    const named = `${entry.title}, ${entry.told}`;
    const image = add(item, entry.picture ? 'img' : 'span', 'picture');
    if (entry.picture) Object.assign(image, { src: entry.picture, alt: '' });
    const words = add(item, 'div', 'words');
    add(words, 'p', 'title', entry.title);
    add(words, 'p', 'when', entry.told);
    const when = new Date(entry.made).toLocaleString();
    add(words, 'p', 'when', entry.phase === 'stopped' ? `${when}, stopped before the end` : when);
    const acts = add(words, 'div', 'bar');
    button(acts, 'Open', named, () => ask('open', [entry.id]));
    button(acts, 'Repeat', named, () => { window.iterisRepeat = true; ask('open', [entry.id]); });
    button(acts, 'Delete', named, (node) => {
      if (sure === entry.id) ask('delete', [entry.id]);
      else {
        sure = entry.id;
        node.textContent = 'Delete for good?';
        node.setAttribute('aria-label', `Delete for good? ${named}`);
      }
    });
    const line = add(acts, 'label'), box = add(line, 'input');
    box.type = 'checkbox';
    box.checked = ticked.includes(entry.id);
    line.append('compare');
    box.addEventListener('change', () => {
      ticked = ticked.filter((id) => id !== entry.id);
      if (box.checked) ticked = [...ticked, entry.id].slice(-2);
      for (const other of list.querySelectorAll('.entry')) {
        other.querySelector('input').checked = ticked.includes(other.dataset.id);
      }
      compare.hidden = ticked.length < 2;
    });
  }
  compare.hidden = ticked.length < 2;
};
watch('value', show);
show();
