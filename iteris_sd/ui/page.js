// For the whole page: buttons that copy a link, and a word on work that went with the page as it was before.
() => {
  const left = 'iteris-left';
  window.addEventListener('pagehide', () => {
    if (document.getElementById('stop')) sessionStorage.setItem(left, 'at work');
  });
  if (sessionStorage.getItem(left)) document.body.classList.add(left);
  sessionStorage.removeItem(left);
  document.addEventListener('click', async (event) => {
    if (event.target.closest('#go')) document.body.classList.remove(left);
    const button = event.target.closest('button[data-copy]');
    if (!button) return;
    const link = document.querySelector(`.${button.dataset.copy}`);
    try {
      await navigator.clipboard.writeText(link.href);
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'Not allowed here: copy the link itself';
    }
  });
}
