// Runs before the first paint: the theme that was chosen, or none, which is the system's.
{
  let theme = null;
  try { theme = localStorage.getItem("tessera-theme"); } catch { /* storage is blocked */ }
  if (theme) document.documentElement.dataset.theme = theme;
}
